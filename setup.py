"""Builds the native CMM library beside the Python code. pyproject.toml holds everything else about the distribution.

Each instruction set is one object compiled with its own flags; the library picks one at run time. A failed build leaves the
package usable: fffsweep.kernels.library then says why and the portable torch form is taken. `_binding`, a shorter way into the
library, is a module of one Python and needs its headers; without it calls go through torch.ops.
"""

import os
import platform
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
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
    """Compiles and links `_native.so`, which is no Python module, so its name carries no interpreter version, and `_binding`."""

    def finalize_options(self) -> None:
        """All sources of both at once."""
        super().finalize_options()
        self.parallel = self.parallel or 2

    def get_ext_filename(self, fullname: str) -> str:
        """Path below the build root."""
        return str(Path(*fullname.split("."))) + ".so" if fullname.endswith("_native") else str(super().get_ext_filename(fullname))

    def build_extension(self, ext: Extension) -> None:
        """Build, or warn and go on without: FFFSWEEP_REQUIRE_NATIVE=1 turns the warning into an error, headers of Python excepted."""
        native = ext.name.endswith("_native")
        without = "The portable torch form will be used, many times slower" if native else "Each call will take some microseconds longer"
        try:
            self._build(ext, native)
        except Exception as error:
            if os.environ.get("FFFSWEEP_REQUIRE_NATIVE") == "1" and (native or has_python_headers()):
                raise
            print(
                f"fffsweep: {ext.name} was not built ({type(error).__name__}: {error}). {without}. A C++20 compiler"
                f"{'' if native else ', the headers of Python'} and torch at build time (--no-build-isolation) mend it.",
                file=sys.stderr,
            )

    def _build(self, ext: Extension, native: bool) -> None:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        of_torch = [*COMMON_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", "-Wno-unknown-pragmas"]
        # torch's parallel_for is a header: without OpenMP in this compilation it would run on one thread
        openmp = ["-fopenmp"] if "OpenMP" in torch.__config__.parallel_info().split("backend:")[-1] and sys.platform == "linux" else []
        if native:
            tasks = [(name, [*of_torch, *openmp], include_paths()) for name in ("operator.cpp", "operator_int8.cpp")]
            tasks += [(name, [*COMMON_FLAGS, *flags], []) for name, flags in flags_of_sources().items()]
        else:
            tasks = [("binding.cpp", of_torch, include_paths())]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1) as pool:
            objects = [name for compiled in pool.map(lambda task: self._compile(*task), tasks) for name in compiled]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects,
            str(target),
            libraries=[*([] if native else ["torch_python"]), "torch_cpu", "torch", "c10"],
            library_dirs=library_paths(),
            extra_postargs=openmp,
            target_lang="c++",
        )

    def _compile(self, name: str, flags: list[str], include_dirs: list[str]) -> list[str]:
        return self.compiler.compile(
            [str(SOURCES / name)], output_dir=self.build_temp, include_dirs=[str(SOURCES), *include_dirs], extra_postargs=flags
        )


def has_python_headers() -> bool:
    """Whether this Python came with its headers; Debian has them in a package of their own."""
    return Path(sysconfig.get_paths()["include"], "Python.h").exists()


NATIVE_FILES = sorted(str(path) for pattern in ("*.cpp", "*.h") for path in SOURCES.glob(pattern))
setup(
    ext_modules=[
        Extension(f"fffsweep.kernels.{name}", sources=NATIVE_FILES, optional=True, language="c++") for name in ("_native", "_binding")
    ],
    cmdclass={"build_ext": BuildNative},
)
