// The emulator's controls for Python. The ops themselves come through csrc/binding.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../attention/plan.h"
#include "emulation.h"

namespace py = pybind11;

PYBIND11_MODULE(GEMMA4_EMULATION, m) {
  using namespace emulation;
  py::enum_<Policy>(m, "Policy")
      .value("FAIR", Policy::kFair)
      .value("RUN_AHEAD", Policy::kRunAhead)
      .value("ADVERSARIAL", Policy::kAdversarial);
  py::class_<Settings>(m, "Settings")
      .def_readwrite("seed", &Settings::seed)
      .def_readwrite("policy", &Settings::policy)
      .def_readwrite("races", &Settings::races)
      .def_readwrite("profile", &Settings::profile)
      .def_readwrite("sm_count", &Settings::sm_count)
      .def_readwrite("max_smem_bytes", &Settings::max_smem_bytes)
      .def_readwrite("has_wgmma", &Settings::has_wgmma)
      .def_readwrite("max_seconds", &Settings::max_seconds)
      .def_readwrite("dependent_launches", &Settings::dependent_launches)
      .def_readwrite("parameters", &Settings::parameters);
  m.attr("settings") = py::cast(&settings(), py::return_value_policy::reference);
  py::class_<SiteCount>(m, "SiteCount")
      .def_readonly("where", &SiteCount::where)
      .def_readonly("kind", &SiteCount::kind)
      .def_readonly("buffer", &SiteCount::buffer)
      .def_readonly("requests", &SiteCount::requests)
      .def_readonly("lanes", &SiteCount::lanes)
      .def_readonly("wavefronts", &SiteCount::wavefronts)
      .def_readonly("ideal_wavefronts", &SiteCount::ideal_wavefronts)
      .def_readonly("sectors", &SiteCount::sectors)
      .def_readonly("ideal_sectors", &SiteCount::ideal_sectors);
  py::class_<BufferCount>(m, "BufferCount")
      .def_readonly("name", &BufferCount::name)
      .def_readonly("bytes", &BufferCount::bytes)
      .def_readonly("read_bytes", &BufferCount::read_bytes)
      .def_readonly("written_bytes", &BufferCount::written_bytes)
      .def_readonly("sectors_touched", &BufferCount::sectors_touched);
  py::class_<LaunchCount>(m, "LaunchCount")
      .def_readonly("kernel", &LaunchCount::kernel)
      .def_readonly("threads", &LaunchCount::threads)
      .def_readonly("blocks", &LaunchCount::blocks)
      .def_readonly("smem_bytes", &LaunchCount::smem_bytes)
      .def_readonly("dependent", &LaunchCount::dependent);
  py::class_<Counts>(m, "Counts")
      .def_readonly("launches", &Counts::launches)
      .def_readonly("switches", &Counts::switches)
      .def_readonly("collectives", &Counts::collectives)
      .def_readonly("barriers", &Counts::barriers)
      .def_readonly("mma", &Counts::mma)
      .def_readonly("sites", &Counts::sites)
      .def_readonly("buffers", &Counts::buffers)
      .def_readonly("launched", &Counts::launched);
  m.def(
      "attention_tile",
      [](int head_dim, int rows, int max_smem_bytes, bool has_wgmma) {
        py::dict tile;
        const gemma4::Device device{nullptr, 1, max_smem_bytes, has_wgmma ? 9 : 8};
        gemma4::with_tile<gemma4::bf16>(
            "attention_tile", head_dim, rows, device, [&]<class Tile>() {
              tile["rows"] = Tile::kRows;
              tile["keys"] = Tile::kKeys;
              tile["column_warps"] = Tile::kColumnWarps;
              tile["threads"] = Tile::kThreads;
              tile["smem_bytes"] = sizeof(gemma4::AttentionSmem<gemma4::bf16, Tile>);
            });
        return tile;
      },
      py::arg("head_dim"), py::arg("rows"), py::arg("max_smem_bytes"), py::arg("has_wgmma") = false,
      "The tile that the planner gives an attention launch.");
  m.def("counts", [] { return counts(); }, "What happened since the last reset.");
  m.def("reset_counts", [] { counts() = {}; });
}
