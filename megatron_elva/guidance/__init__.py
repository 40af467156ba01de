"""Teachers and the tube-wise and frame-wise losses (DESIGN 4). Not built yet: stage 2 trains on L_gen alone."""
