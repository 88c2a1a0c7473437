"""Where ranks stand: two meshes over the same ranks, their process groups and collectives."""
