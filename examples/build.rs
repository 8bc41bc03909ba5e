//! Compiles the service of `stub_routing.rs` in Rust, so that nobody has to install protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=kv.proto");
    tonic_prost_build::configure().compile_fds(protox::compile(["kv.proto"], ["."])?)?;
    Ok(())
}
