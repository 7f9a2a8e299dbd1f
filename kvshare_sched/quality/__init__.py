"""How far answers with reuse are from full prefill: audits, their divergence, and what follows for a tenant."""
