"""What the programs to agree with need before they are imported."""

import sys
import types

# torchvision's operators may not match a CPU build of torch; none of them is needed here.
sys.modules.setdefault(
    "torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations")
)
