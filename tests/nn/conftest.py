"""What the tests of the models share: their helpers on the path."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # for model_cases
