"""What ptxas and the disassembler say of every kernel on every architecture."""

import re

import compiled
import pytest

# Where tiles are chosen: wgmma is Hopper's, blocks of sm_120 have 99 KB of shared memory, those of
# sm_90a and sm_100 227 KB, and sm_80's code runs on cards of either size.
SMALL, LARGE = ("sm_80", "sm_120"), ("sm_80", "sm_90a", "sm_100")
TILES = {
    r".*HopperTile": ("sm_90a",),
    r"attention_kernel<\w+, AttentionTile<(256, 64, 32, 2|512, 48, 16, 2)>": SMALL,
    r"attention_kernel<\w+, AttentionTile<256, 64, 32, 1>": LARGE,
    r"attention_kernel<\w+, AttentionTile<512, 64, 32, 2>": ("sm_80", "sm_100"),
    r"attention_backward_kernel<\w+, AttentionTile<(256, 64, 16, 2|512, 16, 16, 4)>": SMALL,
    r"attention_backward_kernel<\w+, AttentionTile<(256, 64, 32, 2|512, 32, 16, 4)>": LARGE,
}


@pytest.mark.slow
def test_every_kernel_is_compiled_for_every_architecture(kernels):
    """But for tiles that no card running its code is given."""
    made = {(kernel.name, kernel.arch) for kernel in kernels}

    def archs(name):
        matching = (archs for pattern, archs in TILES.items() if re.match(pattern, name))
        return next(matching, compiled.ARCHS)

    assert made == {(name, arch) for name, _ in made for arch in archs(name)}
    assert all(kernel.registers for kernel in kernels)


@pytest.mark.slow
def test_nothing_spills(kernels):
    assert [str(kernel) for kernel in kernels if kernel.stack] == []


# What moves rows must move them 16 bytes at a time: a row kernel's, and of the kernels that are
# cut to a width in elements those of full width.
LOAD, STORE, COPY = r"LDG\.E\..*128.*", r"STG\.E\..*128.*", r"LDGSTS\.E\..*128.*"
INSTRUCTIONS = {
    r"((add_)?rms|moe)_norm_kernel<.*, [124]>": (LOAD, STORE),
    r"((add_)?rms_norm|moe_norm|qkv_norm_rope)_backward_kernel<.*>": (LOAD, STORE),
    r"qkv_norm_rope_kernel<.*>": (LOAD, STORE),
    r"ple_embed_kernel<.*, [124]>": (LOAD, STORE),
    r"(gelu_mul|softcap)_kernel<(.*, 8|(.*, )?float, 4)>": (LOAD, STORE),
    r"(gelu_mul|softcap_cross_entropy)_backward_kernel<(.*, 8|(.*, )?float, 4)>": (LOAD, STORE),
    r"(softcap_argmax|sample|softcap_cross_entropy)_kernel<(.*, 8|float, 4)>": (LOAD,),
    r"attention_kernel<.*AttentionTile.*>": (COPY, STORE, r"LDSM\..*", r"HMMA\.16816\..*"),
    r"(qkv_attention_decode|attention)_kernel<.*CodedTile.*>": (
        *(COPY, STORE, r"LDSM\..*", r"LDS\.128", r"HMMA\.16816\..*"),
    ),
    r"attention_kernel<.*HopperTile.*>": (
        *(COPY, STORE, r"HGMMA\.64x(32|64)x16\..*", r"HGMMA\.64x128x16\..*"),
    ),
    r"attention_merge_kernel<.*>": (LOAD,),
    r"attention_delta_kernel<.*>": (LOAD,),
    r"attention_backward_kernel<.*>": (COPY, STORE, r"LDSM\..*", r"HMMA\.16816\..*"),
    r"linear_small_kernel<\w+, true,.*>": (LOAD, STORE, r"STS\.128.*"),
    r"linear_small_packed_kernel<.*>": (LOAD, r"HMMA\.16816\..*"),
    r"linear_packed_kernel<.*>": (
        *(LOAD, COPY, STORE, r"STS\.128.*", r"HMMA\.16816\..*|HGMMA\.64x128x16\..*"),
    ),
    r"linear_small_kernel<.*>": (LOAD, r"HMMA\.16816\..*"),
    r"moe_stream_\w+_kernel<.*>": (LOAD, STORE, r"HMMA\.16816\..*"),
    r"moe_open_kernel<.*>": (LOAD, STORE, r"STS\.128.*", r"HMMA\.16816\..*"),
    r"moe_small_gate_up_kernel<.*>": (LOAD, STORE, r"HMMA\.16816\..*"),
    r"moe_tiles_kernel<.*>": (COPY, STORE, r"HMMA\.16816\..*|HGMMA\.64x128x16\..*"),
    r"moe_combine_kernel<.*>": (LOAD, STORE),
    r"moe_hidden_gradient_kernel<.*>": (COPY, STORE, r"HMMA\.16816\..*|HGMMA\.64x64x16\..*"),
    r"moe_weight_gradient_kernel<(\w+), \1>": (
        *(COPY, STORE, r"HMMA\.16816\..*|HGMMA\.64x128x16\..*"),
    ),
}


# Kernels that may start while the one before them runs, and how many loads of parameters, of 16
# bytes where rows allow it, each has on its way before it waits.
DEPENDENT = {
    r"linear_small_kernel<\w+, \w+, (?P<sets>\d), .*>": lambda m: 4 * int(m["sets"]),
    # Codes alone: scales of each kind have a branch of their own.
    r"linear_small_packed_kernel<.*>": lambda m: 4,
    r"rms_norm_kernel<.*, (?P<vectors>\d)>": lambda m: int(m["vectors"]),
    r"(add_rms|moe)_norm_kernel<.*, (?P<vectors>\d)>": lambda m: 2 * int(m["vectors"]),
    r"ple_embed_kernel<.*, (?P<vectors>\d)>": lambda m: int(m["vectors"]),
    r"moe_open_kernel<.*>": lambda m: 8,
    r"(gelu_mul|softcap|sample|qkv_attention_decode)_kernel<.*>": lambda m: 0,
    r"(gelu_mul|softcap_cross_entropy)_backward_kernel<.*>": lambda m: 0,
    r"moe_(small_gate_up|stream_down|combine)_kernel<.*>": lambda m: 0,
}
# ptx::load_*_first, which alone leave no line in L1.
PARAMETER = r"LDG\.E\.NA\b.*"


@pytest.mark.slow
@pytest.mark.parametrize("pattern", DEPENDENT)
def test_dependent_kernels_ask_for_parameters_first(kernels, pattern):
    matched = [(re.fullmatch(pattern, k.name), k) for k in kernels if k.arch != "sm_80"]
    chosen = [(match, kernel) for match, kernel in matched if match]
    assert chosen
    assert [str(kernel) for _, kernel in chosen if kernel.before_wait is None] == []
    for match, kernel in chosen:
        early = sum(n for name, n in kernel.before_wait.items() if re.fullmatch(PARAMETER, name))
        assert early >= DEPENDENT[pattern](match), kernel


@pytest.mark.slow
def test_nothing_else_is_touched_before_the_wait(kernels):
    """Whatever waits: an activation's load that was moved there would read what is not yet made."""
    early = [
        f"{kernel}: {name}"
        for kernel in kernels
        for name in kernel.before_wait or ()
        if not re.fullmatch(PARAMETER, name)
    ]
    assert early == []


@pytest.mark.slow
def test_wgmma_starts_before_copies_are_issued(kernels):
    """Behind the barrier of an iteration stand sums of zero and descriptions of tiles, no more; the
    copies of the next tiles, an order of magnitude more, run under the products."""
    found = {str(k): k.before_wgmma for k in kernels if k.has("HGMMA.*")}
    assert found and [name for name, count in found.items() if count is None] == []
    assert {name: count for name, count in found.items() if count > 40} == {}


@pytest.mark.slow
def test_instructions(kernels):
    local = [str(kernel) for kernel in kernels if kernel.has(r"(LDL|STL)\b.*")]
    assert local == [], "kernels that use local memory"
    for pattern, wanted in INSTRUCTIONS.items():
        chosen = [kernel for kernel in kernels if re.fullmatch(pattern, kernel.name)]
        assert chosen, f"no kernel is called {pattern}"
        lacking = [
            f"{kernel} lacks {name}" for kernel in chosen for name in wanted if not kernel.has(name)
        ]
        assert lacking == []
