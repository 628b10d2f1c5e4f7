"""What the scripts of this folder share: runs, and times in turns.

Scripts import it before ``configs``, which it lets them find: started as ``python benchmarks/NAME.py``, Python looks
beside the script alone.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
