"""One file per operator: its documentation, schema, fake kernels, gradient and public function."""
