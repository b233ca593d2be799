"""Export: from a run folder to the forms that are deployed, each checked against the network it was made from.
Imported as ``cellseg_export``."""
