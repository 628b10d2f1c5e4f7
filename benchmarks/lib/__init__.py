"""What the scripts of this folder share: the machine's description, times, and reports as data and as Markdown."""
