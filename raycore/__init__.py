"""raycore: inference engine cores as Ray actors, orchestrated as one fleet."""
