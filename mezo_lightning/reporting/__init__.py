"""What a run tells a person: its records, and the tables, figures and pages that are made of them."""
