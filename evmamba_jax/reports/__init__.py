"""What a run leaves for its reader: metrics, tables and pictures."""

import logging

# It warns where it cannot keep its list of fonts in the home folder; it then makes the list again, no worse.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
