//! Looks up which task owns a key, in nanoseconds, and tells a task what it owns.
//!
//! A sharded service has two sides. A task holds a [`slicelet::Slicelet`]: which keys are mine, and how loaded am I. A
//! caller holds a [`Clerk`]: who owns this key. Both go by assignments that the assigner decides, and both go on with what
//! they last knew while no assigner can be reached. A server and its client, over a protocol of one line:
//!
//! ```no_run
//! use std::error::Error;
//! use std::io::{BufRead, BufReader, Write};
//! use std::net::{TcpListener, TcpStream};
//! use std::time::Duration;
//!
//! use mandoline::slicelet::{Claim, Slicelet};
//! use mandoline::tries::Tries;
//! use mandoline::{Clerk, SliceKey};
//!
//! fn serve(slicelet: &Slicelet, listener: &TcpListener) -> Result<(), Box<dyn Error>> {
//!     for stream in listener.incoming() {
//!         let mut stream = stream?;
//!         let mut key = String::new();
//!         BufReader::new(&stream).read_line(&mut key)?;
//!         match slicelet.claim(key.trim().as_bytes()) {
//!             Claim::Mine => writeln!(stream, "200 hello, {}", key.trim())?,
//!             Claim::Elsewhere(owner) => writeln!(stream, "421 {}", owner.generation)?,
//!         }
//!     }
//!     Ok(())
//! }
//!
//! async fn ask(clerk: &Clerk, key: &str) -> Result<String, Box<dyn Error>> {
//!     let mut tries = Tries::new(clerk, SliceKey::of(key.as_bytes()), Duration::from_secs(5));
//!     loop {
//!         let target = tries.next().await?;
//!         let mut stream = TcpStream::connect(target.address().as_str())?;
//!         writeln!(stream, "{key}")?;
//!         let mut answer = String::new();
//!         BufReader::new(stream).read_line(&mut answer)?;
//!         match answer.trim().split_once(' ') {
//!             Some(("421", generation)) => tries.not_owner(generation.parse()?), // another has it
//!             Some(("503", generation)) => tries.in_transit(generation.parse()?), // it is moving
//!             _ => return Ok(answer),
//!         }
//!     }
//! }
//!
//! # async fn both() -> Result<(), Box<dyn Error>> {
//! let listener = TcpListener::bind("127.0.0.1:9000")?;
//! let slicelet = Slicelet::builder("kv", "kv-0", "127.0.0.1:9000").assigners(["127.0.0.1:7400"]);
//! let slicelet = slicelet.start()?;
//! slicelet.ready().await?;
//! std::thread::spawn(move || serve(&slicelet, &listener).expect("it serves"));
//!
//! let clerk = Clerk::builder("kv").sources(["127.0.0.1:7400"]).start()?;
//! clerk.ready().await;
//! println!("{}", ask(&clerk, "user-42").await?);
//! # Ok(())
//! # }
//! ```

mod boot_clock;
mod sync;
mod gate;
pub mod fence;
pub mod choice;
pub mod snapshot;
mod shown;
mod cache;
mod counters;
mod hot;
pub mod spill;
mod dialer;
mod offered;
pub mod clerk;
pub mod flags;
pub mod tries;
pub mod gateways;
mod term;
mod tenure;
mod owned;
mod guard;
mod install;
mod life;
mod link;
pub mod transfer;
mod moving;
mod steps;
mod overheard;
mod session;
pub mod slicelet;
pub mod http;
#[cfg(feature = "testing")]
pub mod testing;

pub use choice::{Call, Verdict};
pub use clerk::{Clerk, Router};
pub use mandoline_core::assignment::Assignment;
pub use mandoline_core::generation::Generation;
pub use mandoline_core::key::SliceKey;
pub use mandoline_core::load::Load;
pub use mandoline_core::name::{JobName, TaskName};
pub use mandoline_core::report::Size;
pub use mandoline_core::slice::Slice;
pub use mandoline_core::task::{Address, SessionId, Task};
pub use mandoline_core::transit::HandOffId;
pub use mandoline_distributor::connect::Connector;
pub use mandoline_distributor::hub::Hub;
pub use mandoline_distributor::serve::WatchService;
pub use slicelet::{Claim, Slicelet};
pub use snapshot::{NoTask, Sent, Target};
pub use spill::Utilisation;
