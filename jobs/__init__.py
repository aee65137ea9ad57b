"""Ray jobs: prepare, train, tune, evaluate. Each is a thin main over `pneumo`, run inside the
cluster."""
