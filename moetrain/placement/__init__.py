"""Where experts live this step: Placement, planners, the expert store, sparse collectives."""
