//! The one binary, `mandoline`.
fn main() {}
