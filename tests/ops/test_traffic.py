"""What the kernels ask of memory and of the tensor cores, counted by the emulator.

Row kernels: each activation read once and each output written once, in whole 32-byte sectors, and
no bank conflict. Weights are asked for by every block; they are small and stay in the caches, so
for them only the sectors that DRAM must give count. Attention: no product, and no key, beyond those
the tiles cannot do without.
"""

from pathlib import Path

import pytest
import torch
from support import cases, emulated
from support.backends import BF16, CARDS, FP32, in_dtypes
from support.marks import emulated_backend
from support.small_calls import CASES, SMALL, WEIGHTS, case_of, prefill

from gemma4_kernels import opset
from gemma4_kernels.e4m3 import E4M3
from gemma4_kernels.packed import PackedWeight


@pytest.fixture
def counted():
    """The emulator's controls, counting."""
    emulated_backend()
    control = emulated.control()
    control.settings.profile = True
    control.reset_counts()
    yield control
    control.settings.profile = False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("case", CASES)
def test_traffic(counted, case, dtype):
    backend = emulated_backend()
    op, arguments = case_of(backend, case, dtype)
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    counted.settings.seed = 1
    with emulated.one_schedule():
        getattr(backend.ops, op)(**arguments)
    counts = counted.counts()

    # A lane's frequencies, and weights wider than x, are 32 bytes in two loads, a sector each time,
    # and from L1.
    exempt = {"inv_freq"}
    if "fp32 weight" in case and dtype == BF16:
        exempt |= WEIGHTS
    check_sites(counts, exempt)
    for buffer in counts.buffers[: len(counts.buffers) // counts.launches]:
        name, useful = buffer.name, buffer.bytes
        if name in tensors:  # a view may have gaps
            useful = tensors[name].numel() * tensors[name].element_size()
            if name == "ple":
                useful //= tensors[name].shape[1]
        if buffer.written_bytes and name in ("k_cache", "v_cache"):
            useful //= 2
        touched = 32 * buffer.sectors_touched
        assert touched <= 1.02 * useful + 64, f"{name}: {touched} bytes of DRAM for {useful}"
        if name not in SMALL and name != "index":
            asked = buffer.read_bytes + buffer.written_bytes
            assert asked == useful, f"{name}: {asked} bytes asked for, {useful} would do"


BACKWARD = {  # what a call of each backward reads and writes
    "geglu": (("grad", "gate_up"), ("d_gate_up",)),
    "ple_gate": (("grad", "gate", "ple"), ("d_gate", "d_slice")),
    "softcap_cross_entropy": (("logits",), ("d_logits",)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("op", BACKWARD)
def test_backward_traffic(counted, op, dtype):
    """All once, in one launch: five values an element of a gated product, two of a logit."""
    backend = emulated_backend()
    sizes = (64, 1, 256, 0) if op == "ple_gate" else (64, 2048)
    arguments = getattr(cases, op)(backend, *sizes, dtype=dtype)
    if op == "softcap_cross_entropy":
        arguments["targets"] = torch.arange(64)
    backward = getattr(cases, f"{op}_backward")(backend, arguments)
    counted.reset_counts()
    counted.settings.seed = 1
    with emulated.one_schedule():
        opset.kernels.call(opset.OPS[f"{op}_backward"], tuple(backward.values()))
    counts, rows = counted.counts(), ("targets", "lse", "grad_nll", "grad_lse")
    assert counts.launches == 1
    read, written = BACKWARD[op]
    moved = {b.name: (b.read_bytes, b.written_bytes) for b in counts.buffers if b.name not in rows}
    elements = 64 * 2048 if op != "ple_gate" else 64 * 256
    halves = {"gate_up": 2, "d_gate_up": 2}
    expected = {n: (halves.get(n, 1) * elements * dtype.itemsize, 0) for n in read}
    expected |= {n: (0, halves.get(n, 1) * elements * dtype.itemsize) for n in written}
    assert moved == expected
    check_sites(counts, exempt=rows)


def test_cross_entropy_traffic(counted):
    """Logits once, and of a row the one of its target again; of ignored rows none."""
    backend = emulated_backend()
    arguments = cases.softcap_cross_entropy(backend, 8, 4096, dtype=BF16)
    with emulated.one_schedule():
        backend.ops.softcap_cross_entropy(**arguments)
    counts, kept = counted.counts(), int((arguments["targets"] != -100).sum())
    assert counts.launches == 1
    (logits,) = (b for b in counts.buffers if b.name == "logits")
    assert logits.read_bytes == kept * 2 * (4096 + 1) and kept == 6
    chosen = lines_with("linear/softcap_cross_entropy.cuh", "logits[target]")
    check_sites(counts, ("targets", "nll", "lse"), chosen)


def check_sites(counts, exempt=(), exempt_lines=()):
    for site in counts.sites:
        if site.where in exempt_lines:
            continue
        assert site.wavefronts == site.ideal_wavefronts, f"bank conflicts at {site.where}"
        if site.buffer not in exempt:
            assert site.sectors == site.ideal_sectors, f"part of a sector at {site.where}"


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_prefill_work(counted, on_card, card, head_dim):
    """Four heads share the keys; nothing is masked, so every product is useful."""
    (smem_kb, hopper), backend = CARDS[card], on_card(card)
    tile = counted.attention_tile(head_dim, 384, smem_kb * 1024, hopper)
    tokens, heads, keys = 96, 4, 128
    arguments = prefill(backend, tokens, keys, heads, head_dim)
    with emulated.one_schedule():
        backend.ops.attention_prefill(**arguments, causal=False)

    counts, rows = counted.counts(), tokens * heads
    assert counts.mma == 2 * (rows // 16) * (keys // 16) * (head_dim // 16) * 2
    blocks = rows / tile["rows"]
    assert blocks.is_integer()
    asked = {b.name: b.read_bytes + b.written_bytes for b in counts.buffers}
    assert asked["q"] == asked["out"] == arguments["q"].nbytes
    assert asked["k"] == asked["v"] == blocks * arguments["k"].nbytes
    check_sites(counts)


BACKWARD_ROWS = {  # of the tile, by head_dim and KB of shared memory
    **{(64, kb): 64 for kb in (99, 227)},
    **{(128, kb): 64 for kb in (99, 227)},
    (256, 99): 64,
    (256, 227): 64,
    (512, 99): 16,
    (512, 227): 32,
}


@pytest.mark.parametrize("case", BACKWARD_ROWS, ids=str)
def test_prefill_backward_work(counted, on_card, case):
    """Seven products and not one more, on tiles that are full; what a block owns is read once, the
    rest once for each block."""
    head_dim, smem_kb = case
    backend = on_card(f"{smem_kb} KB")
    tokens, heads, keys = 64, 2, 128
    forward = prefill(backend, tokens, keys, heads, head_dim) | dict(scale=0.1, causal=False)
    arguments = cases.attention_prefill_backward(backend, forward)
    counted.reset_counts()
    with emulated.one_schedule():
        backward = opset.OPS["attention_prefill_backward"]
        opset.kernels.call(backward, tuple(arguments.values()))

    counts, rows = counted.counts(), tokens * heads
    assert counts.launches == 3
    assert counts.mma == 7 * (rows // 16) * (keys // 16) * (head_dim // 16) * 2
    asked = dict.fromkeys((b.name for b in counts.buffers), 0)
    for buffer in counts.buffers:
        asked[buffer.name] += buffer.read_bytes + buffer.written_bytes
    own, q, k = BACKWARD_ROWS[case], arguments["q"].nbytes, arguments["k"].nbytes
    assert asked["q"] == (1 + keys / own) * q
    assert asked["out"] == q
    assert asked["grad_out"] == asked["q"] + asked["out"]
    assert asked["k"] == asked["v"] == (1 + rows / own) * k
    assert asked["grad_q"] == q
    assert asked["grad_k"] == asked["grad_v"] == k
    check_sites(counts, exempt=("lse", "grad_lse", "delta"))


@pytest.mark.parametrize("layout", ["rows", "ring", "pages"])
@pytest.mark.parametrize("head_dim", [256, 512])
def test_decode_work(counted, layout, head_dim):
    """Each visible key is read once for all the heads that share it, and no other."""
    backend = emulated_backend()
    batch, heads, kv_heads, length, window = 2, 16, 2, 600, 512 if layout == "ring" else 0
    slots, lengths = 528 if layout == "ring" else 640, [length] * batch
    arguments = cases.attention_decode(
        backend, lengths, slots, heads, kv_heads, head_dim, dtype=BF16
    )
    if layout == "pages":
        for name in ("k_cache", "v_cache"):
            arguments[name] = arguments[name].view(-1, 64, kv_heads, head_dim)
        order = torch.randperm(batch * slots // 64)
        arguments["block_table"] = order.int().view(batch, -1)
    with emulated.one_schedule():
        backend.ops.attention_decode(**arguments, window=window, ring=layout == "ring")
    counts = counted.counts()
    visible = (window or length) * batch * kv_heads * head_dim * 2
    asked = {b.name: b.read_bytes for b in counts.buffers[: len(counts.buffers) // 2]}
    assert asked["k"] == asked["v"] == visible
    check_sites(counts, exempt=("seq_lens", "block_table", "partial_lse", "lse"))


@pytest.mark.parametrize("dtype", [BF16, E4M3], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("layout", ["rows", "ring", "pages"])
@pytest.mark.parametrize("head_dim", [256, 512])
def test_qkv_decode_work(counted, layout, head_dim, dtype):
    """One launch; of the cache every visible key is read once, and the newest written once, in e4m3
    with a scale each. Each split of the keys reads q for itself."""
    backend = emulated_backend()
    batch, heads, kv_heads, length, window = 2, 16, 2, 600, 512 if layout == "ring" else 0
    slots, lengths = 528 if layout == "ring" else 640, [length] * batch
    sizes = lengths, slots, heads, kv_heads, head_dim
    arguments = cases.qkv_attention_decode(backend, *sizes, dtype=BF16, packed=False)
    if layout == "pages":
        for name in ("k_cache", "v_cache"):
            arguments[name] = arguments[name].view(-1, 64, kv_heads, head_dim)
        order = torch.randperm(batch * slots // 64)
        arguments["block_table"] = order.int().view(batch, -1)
    if dtype == E4M3:
        arguments = cases.in_e4m3(backend, arguments)
    with emulated.one_schedule():
        backend.ops.qkv_attention_decode(**arguments, window=window, ring=layout == "ring")
    counts = counted.counts()
    assert counts.launches == 1
    keys, new = (window or length) * batch * kv_heads, batch * kv_heads
    asked = {b.name: (b.read_bytes, b.written_bytes) for b in counts.buffers}
    size = head_dim * dtype.itemsize
    assert asked["k_cache"] == asked["v_cache"] == (keys * size, new * size)
    if dtype == E4M3:
        assert asked["k_scales"] == asked["v_scales"] == (keys * 4, new * 4)
        assert keys * (size + 4) <= 1.03 * keys * size
    splits = 3  # two blocks for each of the card's 3 multiprocessors
    assert asked["q"][0] == splits * batch * heads * head_dim * 2
    assert asked["out"][1] == batch * heads * head_dim * 2
    small = {"seq_lens", "block_table", "positions", "inv_freq", "counters", "partial_lse"}
    check_sites(counts, exempt=small | {"k_scales", "v_scales"})


# The counts that find a block its tile, and the few values that say where results belong.
MOE_SMALL = ("offsets", "order", "experts", "weights")


def lines_with(path, text):
    """Where the emulator's reports place the lines of a kernel that hold this text."""
    lines = (emulated.CSRC / path).read_text().splitlines()
    return [f"{Path(path).name}:{n}" for n, line in enumerate(lines, 1) if text in line]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tokens", [1, 8, 12, 60])
def test_moe_experts_few_work(counted, tokens, dtype):
    """Of each touched expert every weight is read once, and nothing of the others."""
    backend = emulated_backend()
    arguments = cases.moe_experts(backend, tokens, 64, 4, 576, 192, dtype=BF16)
    arguments = in_dtypes(arguments, gate_up=dtype, down=dtype)
    with emulated.one_schedule():
        backend.ops.moe_experts(**arguments)
    counts, touched = counted.counts(), arguments["experts"].unique().numel()
    assert counts.launches == 3
    read = 0
    for buffer in counts.buffers:
        if buffer.name in ("gate_up", "down"):
            expert = arguments[buffer.name][0]
            assert buffer.read_bytes in (0, touched * expert.nbytes)
            assert 32 * buffer.sectors_touched == buffer.read_bytes
            read += buffer.read_bytes
    assert read == 3 * touched * 576 * 192 * dtype.itemsize
    # Which rows of the products meet is the router's choice.
    after_the_loop = lines_with("moe/moe_stream.cuh", "smem.product[")
    check_sites(counts, MOE_SMALL, after_the_loop)


def packed_parts(arguments, touched):
    """The bytes of each part of packed weights, of experts as many as are touched; the parts are
    moved to where sectors begin."""
    floor = {}
    for name in {"gate_up", "down", "dense"} & arguments.keys():
        arguments[name] = PackedWeight(*map(torch.clone, arguments[name].parts))
        ends = "", "_scales", "_row_scales"
        for end, part in zip(ends, arguments[name].parts, strict=True):
            floor[name + end] = part.nbytes if name == "dense" else part[0].nbytes * touched
    return floor


def check_packed(counts, floor):
    """Each code is asked for once, and sectors of scales come once."""
    read, came = dict.fromkeys(floor, 0), dict.fromkeys(floor, 0)
    for buffer in counts.buffers:
        if buffer.name in floor:
            read[buffer.name] += buffer.read_bytes
            came[buffer.name] += 32 * buffer.sectors_touched
    for name in floor:
        assert name.endswith("scales") or read[name] == floor[name]
    assert sum(came.values()) <= 1.03 * sum(floor.values())


FOUR, EIGHT = {"row_scales": True}, {"codes": torch.int8, "row_scales": True}


@pytest.mark.parametrize("form", [FOUR, EIGHT], ids=["4 bits", "8 bits"])
@pytest.mark.parametrize("tokens", [1, 12, 60])
def test_packed_experts_few_work(counted, tokens, form):
    backend = emulated_backend()
    arguments = cases.moe_experts(backend, tokens, 32, 4, 576, 192, dtype=BF16, form=form)
    floor = packed_parts(arguments, arguments["experts"].unique().numel())
    with emulated.one_schedule():
        backend.ops.moe_experts(**arguments)
    counts = counted.counts()
    assert counts.launches == 3
    check_packed(counts, floor)
    after_the_loop = lines_with("moe/moe_stream.cuh", "smem.product[")
    check_sites(counts, (*MOE_SMALL, *(n for n in floor if "scales" in n)), after_the_loop)


@pytest.mark.parametrize("form", [FOUR, EIGHT], ids=["4 bits", "8 bits"])
def test_packed_experts_small_work(counted, form):
    backend = emulated_backend()
    sizes = 1, 32, 4, 576, 192, 320
    arguments = cases.moe_experts_small(backend, *sizes, dtype=BF16, form=form)
    floor = packed_parts(arguments, touched=4)
    with emulated.one_schedule():
        backend.ops.moe_experts_small(**arguments)
    counts = counted.counts()
    assert counts.launches == 2
    check_packed(counts, floor)


def test_packed_experts_many_work(counted):
    """Codes are asked for once a tile of tokens, and the tile they become meets no bank twice."""
    backend = emulated_backend()
    arguments = cases.moe_experts(backend, 200, 2, 1, 128, 64, dtype=BF16, form=FOUR)
    arguments["experts"][:] = 1
    floor = packed_parts(arguments, touched=1)
    with emulated.one_schedule():
        backend.ops.moe_experts(**arguments)
    counts = counted.counts()
    assert counts.launches == 4
    read = dict.fromkeys(("gate_up", "down"), 0)
    for buffer in counts.buffers:
        if buffer.name in read:
            read[buffer.name] += buffer.read_bytes
    assert read == {name: 4 * floor[name] for name in read}
    check_sites(counts, (*MOE_SMALL, *(n for n in floor if "scales" in n)))


@pytest.mark.parametrize(("tokens", "rows"), [(128, 64), (256, 128)])
def test_moe_experts_many_work(counted, tokens, rows):
    """Tiles that are full do no product too many, and no copy or matrix load meets a bank twice."""
    backend = emulated_backend()
    num_experts = 2 if rows == 128 else 4
    arguments = cases.moe_experts(backend, tokens, num_experts, 1, 128, 64, dtype=BF16)
    arguments["experts"][:] = 1
    with emulated.one_schedule():
        backend.ops.moe_experts(**arguments)
    counts = counted.counts()
    assert counts.launches == 4
    products = 3 * tokens * 128 * 64
    assert counts.mma == products // (16 * 8 * 16)
    weights = {b.name: 0 for b in counts.buffers}
    for buffer in counts.buffers:
        weights[buffer.name] += buffer.read_bytes
    for name in ("gate_up", "down"):
        assert weights[name] == tokens // rows * 2 * arguments[name][1].numel()
    check_sites(counts, exempt=MOE_SMALL)


def test_moe_experts_padding_work(counted):
    """Of an expert's last tile, warps that hold no token do no product."""
    backend = emulated_backend()
    arguments = cases.moe_experts(backend, 150, 2, 1, 128, 64, dtype=BF16)
    arguments["experts"][:] = 1
    with emulated.one_schedule():
        backend.ops.moe_experts(**arguments)
    assert counted.counts().mma == 3 * 160 * 128 * 64 // (16 * 8 * 16)


LINEARS = {  # tokens, columns, what comes with them: of each model's linear layers in a step
    "E2B q, k, v": (1, 1536, {"residual", "norm_weight"}),
    "E2B down": (1, 12288, set()),
    "E4B o": (1, 4096, set()),
    "E4B gate and up": (4, 2560, {"residual", "norm_weight", "gated"}),
    "E4B PLE gate": (1, 2560, {"residual", "factor"}),
    "E4B PLE projection": (8, 256, set()),
    "12B o": (1, 8192, set()),
    "12B down": (2, 15360, set()),
    "26B dense down": (16, 2112, set()),
    "26B gate and up": (14, 2816, {"residual", "norm_weight", "gated"}),
    "31B q, k, v": (7, 5376, {"residual", "norm_weight"}),
    "31B down": (1, 21504, set()),
}


@pytest.mark.parametrize("case", LINEARS)
def test_linear_small_work(counted, case):
    """Weights are read once, in whole sectors; no product too many, no bank twice."""
    (tokens, width, parts), backend = LINEARS[case], emulated_backend()
    arguments = cases.linear_small(backend, tokens, width, 48, *parts, dtype=BF16)
    weight = arguments["weight"]
    with emulated.one_schedule():
        backend.ops.linear_small(**arguments)
    counts = counted.counts()
    (read,) = [b for b in counts.buffers if b.name == "weight"]
    assert counts.launches == 1
    assert read.read_bytes == weight.nbytes == 32 * read.sectors_touched
    batches = -(-width // 1024)  # of 8 warps, which take two lines of 64 columns each
    assert counts.mma == weight.shape[0] // 8 * batches * 1024 // 16
    # Eight rows of y, and of the factor, are half a sector.
    check_sites(counts, exempt=("y", "factor", "scale"))


PACKED_LINEARS = {  # tokens, width, rows, what comes with it, codes, scales
    "E4B q, k, v": (1, 2560, 48, {"residual", "norm_weight"}, torch.uint8, BF16),
    "E4B gate and up": (8, 2560, 32, {"residual", "norm_weight", "gated"}, torch.uint8, BF16),
    "26B dense down": (16, 2112, 48, set(), torch.uint8, torch.float8_e4m3fn),
    "26B expert": (1, 704, 48, set(), torch.uint8, torch.float8_e8m0fnu),
    "31B down": (1, 21504, 16, set(), torch.int8, BF16),
    "12B o": (8, 8192, 32, set(), torch.float8_e4m3fn, None),
}


def on_sectors(weight):
    """Beginning where a card's memory would: on a sector."""

    def moved(part):
        room = torch.empty(part.nbytes + 32, dtype=torch.uint8)
        begin = -room.data_ptr() % 32
        there = room[begin : begin + part.nbytes].view(part.dtype).view(part.shape)
        return there.copy_(part)

    return PackedWeight(*(None if part is None else moved(part) for part in weight.parts))


def packed_bytes(counts):
    """What was asked for of a packed weight, in whole sectors: lanes share scales."""
    parts = [site for site in counts.sites if site.buffer.startswith("weight")]
    return sum(32 * site.sectors for site in parts)


@pytest.mark.parametrize("case", PACKED_LINEARS)
def test_linear_small_packed_work(counted, case):
    """Codes and scales are read once, in whole sectors, by loads of 16 bytes; no bank twice."""
    tokens, width, rows, parts, codes, scales = PACKED_LINEARS[case]
    backend, form = emulated_backend(), dict(codes=codes, scales=scales)
    arguments = cases.linear_small(
        backend, tokens, width, rows, *parts, dtype=BF16, form=form | {"row_scales": False}
    )
    weight = arguments["weight"] = on_sectors(arguments["weight"])
    with emulated.one_schedule():
        backend.ops.linear_small(**arguments)
    counts = counted.counts()
    assert counts.launches == 1
    (read,) = [b for b in counts.buffers if b.name == "weight"]
    assert read.read_bytes == weight.codes.nbytes
    floor = weight.codes.nbytes + (0 if scales is None else weight.scales.nbytes)
    rows_read = 0 if weight.row_scales is None else weight.row_scales.nbytes
    assert packed_bytes(counts) <= 1.03 * floor + 2 * rows_read
    eights = -(-tokens // 8)
    assert counts.mma == weight.shape[0] // 16 * width // 16 * eights
    # Sixteen rows of y are a sector, which no one store fills.
    check_sites(counts, exempt=("y", "weight_row_scales"))


def test_linear_packed_tiles_work(counted):
    """Weights are read once for each tile of 128 tokens, and no bank twice."""
    backend = emulated_backend()
    arguments = cases.linear_packed(backend, 256, 192, 384, dtype=BF16)
    weight = arguments["weight"] = on_sectors(arguments["weight"])
    with emulated.one_schedule():
        backend.ops.linear_packed(**arguments)
    counts = counted.counts()
    assert packed_bytes(counts) == 2 * weight.nbytes
    assert counts.mma == 256 // 16 * 384 // 8 * 192 // 16
    check_sites(counts)


@pytest.mark.parametrize("tokens", [1, 9])
def test_moe_open_work(counted, tokens):
    """Both weights are read once, in whole sectors, in one launch."""
    backend = emulated_backend()
    arguments = cases.moe_open(backend, tokens, 1088, 48, 32, dtype=BF16)
    with emulated.one_schedule():
        backend.ops.moe_open(**arguments)
    counts = counted.counts()
    assert counts.launches == 1
    read = {b.name: (b.read_bytes, 32 * b.sectors_touched) for b in counts.buffers}
    for name in ("gate_up", "router"):
        assert read[name] == (arguments[name].nbytes,) * 2
    assert counts.mma == (2 * 48 + 32) // 8 * 2 * 1024 // 16
    check_sites(counts, exempt=("hidden", "logits"))


@pytest.mark.parametrize("tokens", [1, 9])
def test_moe_experts_small_work(counted, tokens):
    """Of each touched expert, and of the dense product, every weight is read once: two launches."""
    backend = emulated_backend()
    arguments = cases.moe_experts_small(backend, tokens, 64, 4, 576, 192, 320, dtype=BF16)
    with emulated.one_schedule():
        backend.ops.moe_experts_small(**arguments)
    counts = counted.counts()
    assert counts.launches == 2
    routing = (arguments[name] for name in ("logits", "per_expert_scale", "k"))
    touched = backend.ops.moe_route(*routing)[1].unique().numel()
    expected = {name: touched * arguments[name][0].nbytes for name in ("gate_up", "down")}
    expected["dense"] = arguments["dense"].nbytes
    read = dict.fromkeys(expected, 0)
    for buffer in counts.buffers:
        if buffer.name in read:
            assert 32 * buffer.sectors_touched == buffer.read_bytes
            read[buffer.name] += buffer.read_bytes
    assert read == expected
    # Which rows of the products and of the order meet is the router's choice.
    routed = lines_with("moe/moe_stream.cuh", "smem.product[")
    routed += lines_with("moe/moe_experts_small.cuh", "choice.order[before]")
    small = (*MOE_SMALL, "chosen", "chosen_weights", "logits", "per_expert_scale", "dense_y")
    check_sites(counts, small, routed)


@pytest.mark.parametrize("top_k", [0, 64])
def test_sample_work(counted, top_k):
    """The logits are read once, in whole sectors, and of four parts' winners each once."""
    backend = emulated_backend()
    arguments = cases.sample(backend, 2, 8192, dtype=BF16, temperature=0.7, top_k=top_k)
    with emulated.one_schedule():
        backend.ops.sample(**arguments)
    counts = counted.counts()
    buffers = {b.name: b for b in counts.buffers}
    assert counts.launches == 1
    read = buffers["logits"]
    assert read.read_bytes == arguments["logits"].nbytes == 32 * read.sectors_touched
    assert buffers["kept"].read_bytes == buffers["kept"].written_bytes == 2 * 4 * (top_k or 2) * 8
    state = ("seeds", "positions", "ids", "done", "counters", "eos")
    # Where winners stand among the others is the logits' choice.
    places = lines_with("linear/sample.cuh", "smem.kept[rank]")
    places += lines_with("linear/sample.cuh", "smem.kept[to + ")
    check_sites(counts, (*state, "kept"), places)


PLANS = {  # head_dim, rows, KB of shared memory, Hopper: rows, keys and column warps of the tile
    (64, 1000, 99, False): (64, 64, 1),
    (128, 1000, 64, False): (64, 64, 1),
    (256, 8, 64, False): (16, 32, 4),
    (256, 1000, 99, False): (64, 32, 2),
    (256, 1000, 163, False): (64, 32, 1),
    (256, 1000, 227, False): (64, 32, 1),
    (512, 16, 99, False): (16, 32, 4),
    (512, 17, 99, False): (48, 16, 2),
    (512, 1000, 163, False): (64, 32, 2),
    (512, 1000, 227, False): (64, 32, 2),
    (256, 16, 227, True): (16, 32, 4),
    (256, 64, 227, True): (64, 32, 1),
    (256, 65, 227, True): (128, 64, 1),
    (512, 16, 227, True): (16, 32, 4),
    (512, 17, 227, True): (64, 32, 2),
}


@pytest.mark.parametrize("case", PLANS, ids=str)
def test_plan(counted, case):
    head_dim, rows, smem_kb, hopper = case
    tile = counted.attention_tile(head_dim, rows, smem_kb * 1024, hopper)
    assert (tile["rows"], tile["keys"], tile["column_warps"]) == PLANS[case]
    assert tile["smem_bytes"] <= smem_kb * 1024 and tile["threads"] <= 256


@pytest.mark.parametrize(
    ("head_dim", "smem_kb", "sentence"),
    [
        (512, 64, "no tile of head_dim 512 fits in 65536 bytes"),
        (96, 227, "head_dim 64, 128, 256 and 512, got 96"),
    ],
)
def test_no_plan(counted, head_dim, smem_kb, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        counted.attention_tile(head_dim, 1000, smem_kb * 1024)
