"""How it teaches: route, query, roll out, match.

In the order in which ``step`` (fresh rollouts) and ``streaming`` (carried ones) use them: ``routing`` and ``routers``
give each sample its field, ``batch`` its data, ``query`` and ``query_states`` say where it is asked, ``schedule`` and
``solver`` make the ``rollout``, ``pool`` and ``selection`` serve ``streaming``, ``matching`` holds the student against
the field by an ``objective`` (``sde`` for one of its weights), ``losses`` keeps each route's. ``method`` is what the
trainer and the baselines know of it.
"""
