"""What a finished run tells people: sums per group, the page ``report.html``, and files for MultiQC."""
