"""The parity gate: a form is compared with its source before it is kept."""
