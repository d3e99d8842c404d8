"""python -m clip_jax.aot --config=configs/vitb16.py --topology=v5e:16x16[,v4:8x8x4] [--json=OUT].

Compiles the train step for TPUs that are not there: does it fit, and how fast can it be at most?
"""

import json
import sys
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from clip_jax.aot.compile import report_on
from clip_jax.aot.topology import leave_devices_alone
from clip_jax.config import parse_flags
from clip_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The recipe, such as configs/vitb16.py.", lock_config=True
)
_TOPOLOGY = flags.DEFINE_list(
    "topology", None, "What to compile for, such as v5e:16x16, or v5e:16x16*2 for two slices."
)
_JSON = flags.DEFINE_string(
    "json",
    None,
    "A file for the report, or of several topologies the list; docs/pods.md says what is in it.",
)
_HLO = flags.DEFINE_string(
    "hlo",
    None,
    "A file for the compiled step's text; of several topologies, the last one's.",
)
_ADVICE = flags.DEFINE_bool("advice", True, "Look for the smallest change that fits.")
flags.FLAGS.verbosity = logging.WARNING  # type: ignore[assignment]


def main(_: list[str]) -> None:
    """Compiles for each topology, prints and writes; exits with status 1 if one does not fit."""
    recipe = config_flags.get_config_filename(flags.FLAGS["config"])
    reports: list[dict[str, Any]] = []
    leave_devices_alone()
    try:
        if not _TOPOLOGY.value:
            sys.exit("--topology is missing, such as --topology=v5e:16x16")
        for name in _TOPOLOGY.value:
            report = report_on(
                _CONFIG.value,
                name,
                recipe=recipe,
                advise=_ADVICE.value,
                hlo=Path(_HLO.value) if _HLO.value else None,
            )
            print(report.to_text(), flush=True)
            reports.append(report.to_dict())
    except UserError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    finally:
        if _JSON.value and reports:
            found = reports if len(_TOPOLOGY.value or ()) > 1 else reports[0]
            Path(_JSON.value).write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(0 if all(report["fits"] for report in reports) else 1)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
