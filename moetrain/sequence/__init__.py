"""Where sequences go this step: SequencePlan and its planners."""
