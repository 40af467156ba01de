"""Teachers and the tube-wise and frame-wise losses. Not built yet: stage 2 trains on L_gen alone."""
