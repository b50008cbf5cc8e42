//! The guest as `xl` sees it.
