"""Export: from a run folder to deployable model forms, each checked against the network it was made from.
Imported as ``cellseg_export``."""
