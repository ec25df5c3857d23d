// Which ops each family gives to torch's dispatcher.
#pragma once

#include <torch/csrc/stable/library.h>

namespace binding {

using Library = torch::stable::detail::StableLibrary;

void register_norm(Library& m);
void register_attention(Library& m);
void register_moe(Library& m);
void register_ple(Library& m);
void register_linear(Library& m);

}  // namespace binding
