//! A sharded server and its client, over a protocol of one line: a key goes in, and the task that owns it answers.
//!
//! With `cargo run -- assigner --init --data-dir a` running and a job made by `echo 'name: echo' | cargo run -- job apply -`:
//!
//!     cargo run -p examples --example echo -- serve echo-0 127.0.0.1:9070
//!     cargo run -p examples --example echo -- ask user-42

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use mandoline::slicelet::{Claim, Slicelet};
use mandoline::tries::Tries;
use mandoline::{Address, Clerk, SliceKey};

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
    let slicelet = Slicelet::builder("echo", name, &address).assigners(assigners).start()?;
    slicelet.ready().await?;
    println!("{name} serves at {address}");
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

/// Asks the owner of each key. Whoever refuses it says by which assignment, and that tells when to ask whom next.
async fn ask(keys: &[&str], assigners: &[&str]) -> Result<(), Box<dyn Error>> {
    let clerk = Clerk::builder("echo").sources(assigners).start()?;
    clerk.ready().await;
    for key in keys {
        let mut tries = Tries::new(&clerk, SliceKey::of(key.as_bytes()), Duration::from_secs(5));
        loop {
            let answer = send(tries.next().await?.address(), key)?;
            match answer.trim().split_once(' ') {
                Some(("421", generation)) => tries.not_owner(generation.parse()?),
                Some(("503", generation)) => tries.in_transit(generation.parse()?),
                _ => {
                    print!("{answer}");
                    break;
                }
            }
        }
    }
    Ok(())
}

fn send(to: &Address, key: &str) -> Result<String, Box<dyn Error>> {
    let mut stream = TcpStream::connect(to.as_str())?;
    writeln!(stream, "{key}")?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    Ok(answer)
}
