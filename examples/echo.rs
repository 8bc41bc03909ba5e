//! A sharded server and its client, over a protocol of one line: a key goes in, and the task that owns it answers.
//!
//! With `cargo run -- assigner --init --data-dir a` running and a job made by `echo 'name: echo' | cargo run -- job apply -`:
//!
//!     cargo run -p mandoline --example echo -- serve echo-0 127.0.0.1:9000
//!     cargo run -p mandoline --example echo -- ask user-42

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use mandoline::Clerk;
use mandoline::slicelet::{Claim, Slicelet};

const USAGE: &str = "usage: echo serve NAME ADDRESS | echo ask KEY...   (MANDOLINE_ASSIGNERS: whom to ask, 127.0.0.1:7400)";

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let assigners =
        std::env::var("MANDOLINE_ASSIGNERS").unwrap_or_else(|_| "127.0.0.1:7400".to_owned());
    let assigners: Vec<&str> = assigners.split(',').collect();
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["serve", name, address] => serve(name, address, &assigners).await,
        ["ask", keys @ ..] if !keys.is_empty() => ask(keys, &assigners).await,
        _ => Err(USAGE.into()),
    }
}

/// Answers for the keys that this task owns, and says of the others what it knows.
async fn serve(name: &str, address: &str, assigners: &[&str]) -> Result<(), Box<dyn Error>> {
    let listener = TcpListener::bind(address)?;
    let address = listener.local_addr()?.to_string();
    let slicelet =
        Slicelet::builder("echo", name, &address).assigners(assigners.iter().copied()).start()?;
    slicelet.ready().await?;
    println!("{name} serves {} slices at {address}", slicelet.owned());
    for stream in listener.incoming() {
        let mut stream = stream?;
        let mut key = String::new();
        BufReader::new(&stream).read_line(&mut key)?;
        let key = key.trim();
        match slicelet.claim(key.as_bytes()) {
            Claim::Mine => writeln!(stream, "200 {name} has {key}")?,
            Claim::Elsewhere(owner) => writeln!(stream, "421 {}", owner.generation)?,
        }
    }
    Ok(())
}

/// Asks the owner of each key. One that was moved just now is asked for once more, when the clerk has caught up.
async fn ask(keys: &[&str], assigners: &[&str]) -> Result<(), Box<dyn Error>> {
    let sources = assigners.iter().map(|address| address.parse()).collect::<Result<Vec<_>, _>>()?;
    let clerk = Clerk::builder("echo".parse()?).sources(sources).start()?;
    clerk.ready().await;
    for key in keys {
        let mut answer = ask_owner(&clerk, key)?;
        if let Some(generation) = answer.strip_prefix("421 ") {
            clerk.wait_for(generation.trim().parse()?, Duration::from_secs(1)).await?;
            answer = ask_owner(&clerk, key)?;
        }
        print!("{answer}");
    }
    Ok(())
}

fn ask_owner(clerk: &Clerk, key: &str) -> Result<String, Box<dyn Error>> {
    let target = clerk.route(key.as_bytes())?;
    let mut stream = TcpStream::connect(target.address().as_str())?;
    writeln!(stream, "{key}")?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    Ok(answer)
}
