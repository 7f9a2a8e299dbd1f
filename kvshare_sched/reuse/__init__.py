"""One request, decided: lookup, plan, admission, publishing, report. No torch, no engine."""
