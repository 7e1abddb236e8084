"""Numbers and what stores them: formats, quantized tensors, and the solvers that round. numpy alone: no graph is known here."""
