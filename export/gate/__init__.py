"""The parity gate: a form is run beside its origin before it is kept."""
