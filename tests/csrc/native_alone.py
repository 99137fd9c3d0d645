"""`native_alone.py FILE`: loads a build of _native without torch, prints whether it has CUDA."""

import importlib.util
import sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
assert spec is not None and spec.loader is not None
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
maps = Path("/proc/self/maps")
assert not maps.exists() or "libcuda" not in maps.read_text(), "asks for a driver"
assert hasattr(module, "blend_box")
print(module.cuda_built())
