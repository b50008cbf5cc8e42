//! The remus command line.
fn main() {}
