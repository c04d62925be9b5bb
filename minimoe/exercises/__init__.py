"""Is the learner's answer right? The instant checks of the exercises: one module per lesson, one function per exercise.

    from minimoe.exercises import lesson_03 as check

    def rmsnorm_backward(gain, x_hat, inv_rms, dy):
        ...

    check.rmsnorm_backward(rmsnorm_backward)      "not attempted yet", or a sentence and a small table

An exercise is always a function that the learner writes; the check of the same name takes it and returns a ``Report``.
About half of the checks compare a gradient with finite differences of the true forward pass, or a value with the
package's own forward pass; the others compare with a closed form, which is in the module. A check also knows the usual
wrong answers, so that it can say which one it sees. ``engine`` compares the results, ``diagnosis`` describes what is
wrong, and ``feedback`` displays the report.
"""
