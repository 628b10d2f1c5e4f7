"""How figures are measured and written down: rounds in turns, the machine, processes that answer, documents."""
