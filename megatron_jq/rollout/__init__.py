"""F3: sampling rationales (and answers, where an estimator wants them) from the policy."""
