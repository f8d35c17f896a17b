"""One JAX program, any mesh: a sharding-based SPMD trainer."""
