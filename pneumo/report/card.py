"""What the page answers of CLAIM 2024, and where; the rest is for who writes the paper."""

from __future__ import annotations

CLAIM: tuple[tuple[int, str, str, str], ...] = (
    (1, "AI methodology and its category named", "card", "Model card"),
    (3, "Intended use", "card", "Model card"),
    (7, "Data sources", "card", "Model card"),
    (8, "Inclusion and exclusion", "data", "Data and leakage audit"),
    (9, "Preprocessing", "again", "Do it again"),
    (10, "Selection of subsets", "data", "Data and leakage audit"),
    (11, "De-identification", "card", "Model card"),
    (12, "Missing data", "quality", "Data quality"),
    (14, "Reference standard", "card", "Model card"),
    (19, "How studies were assigned to partitions", "data", "Data and leakage audit"),
    (20, "Level at which partitions are disjoint", "data", "Data and leakage audit"),
    (22, "Model described", "card", "Model card"),
    (23, "Software and its versions", "again", "Do it again"),
    (24, "Where the parameters started", "card", "Model card"),
    (25, "Training", "training", "Training"),
    (26, "How the final model was chosen", "card", "Model card"),
    (27, "Ensembling", "card", "Model card"),
    (28, "Metrics of performance", "good", "How good, how sure?"),
    (29, "Uncertainty and significance", "good", "How good, how sure?"),
    (30, "Robustness: subgroups", "whom", "For whom?"),
    (31, "Explainability, and its test", "looks", "Where does it look?"),
    (32, "Evaluation on internal data", "good", "How good, how sure?"),
    (35, "Studies included and excluded", "data", "Data and leakage audit"),
    (36, "Demographics of each partition", "quality", "Data quality"),
    (37, "Performance with uncertainty", "summary", "Summary"),
    (38, "Diagnostic performance and its precision", "points", "At what threshold?"),
    (39, "Failure analysis", "errors", "Errors"),
    (40, "Limitations", "card", "Model card"),
)
"""Number, the item in our words, and the section that answers it (Tejani 2024)."""
NOT_ANSWERED = "2, 4–6, 13, 15–18, 21, 33, 34 and 41–44"
"""Among them external data (33), readers' variability (18) and sample size (21)."""
