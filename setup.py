"""Packages and version; the compiled extension will be added to `ext_modules` here.

setup.py and not pyproject.toml names the packages because two import packages from two folders,
`gemma4_kernels` and `gemma4` (in `python/`), make one distribution.
"""

import ast
from pathlib import Path

from setuptools import setup

SOURCE = Path(__file__).parent / "gemma4_kernels" / "__init__.py"


def version() -> str:
    """The string assigned to `__version__`, read without importing (torch may be absent here)."""
    for node in ast.parse(SOURCE.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__version__":
            return ast.literal_eval(node.value)
    raise RuntimeError(f"{SOURCE} assigns no __version__")


setup(
    version=version(),
    packages=["gemma4_kernels", "gemma4", "gemma4.demo"],
    package_dir={"gemma4_kernels": "gemma4_kernels", "gemma4": "python/gemma4"},
    package_data={
        "gemma4_kernels": ["py.typed"],
        "gemma4": ["py.typed"],
        "gemma4.demo": ["*.json", "*.jinja", "*.safetensors", "README.md"],
    },
    ext_modules=[],
)
