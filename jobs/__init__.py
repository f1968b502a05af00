"""The jobs: what a scheduler or a person runs, as ``python -m jobs.<name>``.

Where they are run from a copy of the repository that is not installed, as ``ray job submit --working-dir`` makes one, the rest of
the project is found beside them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
