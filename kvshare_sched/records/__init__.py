"""Frozen records that flow through the system: RequestView -> ReusePlan -> ShareReport. Each checks itself."""
