//! Says by Rust's clerk who owns each of many keys, for the tests to compare with what Python's says: keys come by standard input, each
//! after its length (two bytes, little-endian), and addresses go out, one a line, after the generation.

use std::error::Error;
use std::io::{BufWriter, Read, Write, stdin, stdout};

use mandoline::Clerk;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [job, source] = &args[..] else { return Err("usage: owners JOB ASSIGNER < KEYS".into()) };
    let clerk = Clerk::builder(job).sources([source]).start()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_time().build()?;
    let assignment = runtime.block_on(clerk.ready());
    let mut keys = Vec::new();
    stdin().lock().read_to_end(&mut keys)?;
    let mut out = BufWriter::new(stdout().lock());
    writeln!(out, "{}", assignment.generation)?;
    let mut rest = &keys[..];
    while let Some((length, after)) = rest.split_first_chunk() {
        let (key, next) = after.split_at(usize::from(u16::from_le_bytes(*length)));
        writeln!(out, "{}", clerk.route(key)?.address())?;
        rest = next;
    }
    out.flush()?;
    Ok(())
}
