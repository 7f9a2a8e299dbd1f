"""The process that talks HTTP: who is asking, the report in the answer, pages."""
