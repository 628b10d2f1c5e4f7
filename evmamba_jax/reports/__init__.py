"""What a run leaves for its reader: figures as lines and events, curves, pictures, tables."""
