"""Builds the native CMM library beside the Python code. pyproject.toml holds everything else about the distribution.

Each instruction set is one object compiled with its own flags; the library picks one at run time. A failed build leaves the
package usable: fffsweep.kernels.native then says why and the portable torch form is taken.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("kernels/native")
COMMON_FLAGS = [
    *["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-g0"],
    # vector types in internal signatures; GCC 12's own intrinsics start from an undefined register
    *["-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"],
]
X86_FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"],
    "avx512_bf16": [
        *["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mavx512vnni"],
        "-mprefer-vector-width=512",
    ],
}


def flags_of_sources() -> dict[str, list[str]]:
    """Compiler flags of each source of the library."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    flags = {"isa_generic.cpp": [], "blas_token.cpp": [], "dispatch.cpp": ["-DCMM_X86"] if x86 else []}
    if x86:
        flags |= {f"isa_{name}.cpp": list(isa_flags) for name, isa_flags in X86_FLAGS.items()}
    return flags


class BuildNative(build_ext):
    """Compiles and links `_native.so`; it is no Python module, so its name carries no interpreter version."""

    def get_ext_filename(self, fullname: str) -> str:
        """Path of the library below the build root."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Build, or warn and go on without: FFFSWEEP_REQUIRE_NATIVE=1 turns the warning into an error."""
        try:
            self._build(ext)
        except Exception as error:
            if os.environ.get("FFFSWEEP_REQUIRE_NATIVE") == "1":
                raise
            print(
                f"fffsweep: the native CMM kernels were not built ({type(error).__name__}: {error}). The portable torch form will be used, "
                "many times slower. A C++20 compiler and torch at build time (--no-build-isolation) mend it.",
                file=sys.stderr,
            )

    def _build(self, ext: Extension) -> None:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        objects = []
        for name, flags in flags_of_sources().items():
            objects += self._compile(name, [*COMMON_FLAGS, *flags], [])
        # torch's parallel_for is a header: without OpenMP in this compilation it would run on one thread
        openmp = ["-fopenmp"] if "OpenMP" in torch.__config__.parallel_info().split("backend:")[-1] and sys.platform == "linux" else []
        for name in ("operator.cpp", "operator_int8.cpp"):
            objects += self._compile(name, [*COMMON_FLAGS, abi, "-Wno-unknown-pragmas", *openmp], include_paths())
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects,
            str(target),
            libraries=["torch_cpu", "torch", "c10"],
            library_dirs=library_paths(),
            extra_postargs=openmp,
            target_lang="c++",
        )

    def _compile(self, name: str, flags: list[str], include_dirs: list[str]) -> list[str]:
        return self.compiler.compile(
            [str(SOURCES / name)], output_dir=self.build_temp, include_dirs=[str(SOURCES), *include_dirs], extra_postargs=flags
        )


NATIVE_FILES = sorted(str(path) for pattern in ("*.cpp", "*.h") for path in SOURCES.glob(pattern))
setup(
    ext_modules=[Extension("fffsweep.kernels._native", sources=NATIVE_FILES, optional=True, language="c++")],
    cmdclass={"build_ext": BuildNative},
)
