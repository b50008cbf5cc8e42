//! The remusd daemon.
fn main() {}
