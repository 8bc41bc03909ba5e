//! Compiles the schemas in Rust, so that nobody has to install protoc.

use std::path::PathBuf;

use protox::prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["assignment", "task", "flags", "transfer", "admin", "log", "raft"]
        .map(|name| format!("mandoline/v1/{name}.proto"));
    let schema = protox::compile(files, ["."])?;
    println!("cargo::rerun-if-changed=mandoline/v1");
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("mandoline.v1.bin"), schema.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".").btree_map(".").compile_fds(schema)?;
    Ok(())
}
