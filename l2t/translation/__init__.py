"""Machine translation: students that translate, taught by losses over a vocabulary."""
