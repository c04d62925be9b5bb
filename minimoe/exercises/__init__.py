"""The instant checks of the lessons' exercises: one module a lesson, one function an exercise.

    from minimoe.exercises import lesson_03 as check

    def rmsnorm_backward(gain, x_hat, inv_rms, dy):
        ...

    check.rmsnorm_backward(rmsnorm_backward)      "not attempted yet", then words and a small table

An exercise is always a function that the learner writes; the check of the same name takes it and returns a ``Report``.
A check holds no answer key: a gradient is compared with finite differences of the true forward pass, a value with the
package's own forward pass. What a check knows beyond that are the usual wrong answers, so that it can say which one it
sees. Drawing of inputs, comparison and words are in ``engine``, ``diagnosis`` and ``report``.
"""
