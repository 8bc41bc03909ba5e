//! One proxy takes over from another: who leaves which file behind, who waits for whom, and what is bound anew.

use std::io::{self, Write as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;

use tokio_util::sync::CancellationToken;

use super::harness::{Owners, config};
use crate::config::listener::Listener;
use crate::config::{Checked, Config};
use crate::handover::{Offer, Taken, prepare, take};
use crate::sockets::{Sockets, SocketsError};

fn checked(change: impl FnOnce(&mut Config)) -> Checked {
    config(&Owners::none(), change).check().unwrap()
}

fn anywhere() -> Listener {
    "127.0.0.1:0".parse::<std::net::SocketAddr>().unwrap().into()
}

/// An offer at a file of its own.
fn offered(folder: &Path) -> (PathBuf, Offer, CancellationToken) {
    let (path, stop) = (folder.join("handover"), CancellationToken::new());
    let sockets = Sockets::bind(&checked(|_| {})).unwrap();
    let offer = prepare(&path).unwrap().offer(sockets, stop.clone()).unwrap();
    (path, offer, stop)
}

/// A process that offers, as a test wants it: it shows no sockets, and says this before it hangs up.
fn says(path: &Path, words: &'static [u8]) -> Taken {
    let listener = UnixListener::bind(path).unwrap();
    let talks = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&[0; 128]).unwrap();
        stream.write_all(words).unwrap();
    });
    let taken = take(path).unwrap().expect("somebody offers");
    talks.join().unwrap();
    taken
}

#[test]
fn who_is_taken_over_from_leaves_the_file_to_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let (path, offer, stop) = offered(folder.path());
    let taken = take(&path).unwrap().expect("somebody offers");
    assert_eq!(taken.sockets.len(), 1);
    assert!(!offer.is_taken());
    taken.serves().unwrap();
    // It has hung up, so it knows.
    assert!(offer.is_taken() && stop.is_cancelled());
    // The next is about to replace the file: to remove it now could remove that one's.
    drop(offer);
    assert!(path.exists());
    assert!(take(&path).unwrap().is_none(), "nobody is behind it");
}

#[test]
fn an_offer_that_nobody_takes_leaves_no_file_and_a_later_ones_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (path, first, _) = offered(folder.path());
    let (_, second, _) = offered(folder.path());
    drop(first);
    assert!(path.exists());
    drop(second);
    assert!(!path.exists());
    drop(prepare(&path).unwrap());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn who_is_stopped_while_the_next_starts_waits_for_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let (path, offer, _) = offered(folder.path());
    let taken = take(&path).unwrap().expect("somebody offers");
    drop(offer);
    // Nobody has waited, so this one is not late.
    taken.serves().unwrap();
}

#[test]
fn one_that_takes_nothing_leaves_all_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let (path, offer, stop) = offered(folder.path());
    drop(take(&path).unwrap().expect("somebody offers"));
    // It is noticed before the next one is heard.
    let taken = take(&path).unwrap().expect("somebody offers still");
    assert!(!offer.is_taken() && !stop.is_cancelled());
    taken.serves().unwrap();
    assert!(offer.is_taken());
}

#[test]
fn where_the_old_process_has_ended_the_new_one_serves_and_where_it_goes_on_not() {
    let folder = tempfile::tempdir().unwrap();
    says(&folder.path().join("ended"), b"").serves().unwrap();
    let error = says(&folder.path().join("late"), b"l").serves().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
}

#[test]
fn listeners_come_and_go_as_one_process_takes_over_from_another() {
    let before = checked(|config| config.listeners.push(anywhere()));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("handover");
    let sockets = Sockets::bind(&before).unwrap();
    let [kept, gone] = <[_; 2]>::try_from(sockets.addresses(&before)).unwrap();
    let offer = prepare(&path).unwrap().offer(sockets, CancellationToken::new()).unwrap();
    let given = || take(&path).unwrap().expect("somebody offers").sockets;
    // One that is to listen nowhere where the other does is another proxy.
    let error = Sockets::take_over(&checked(|_| {}), given()).unwrap_err();
    assert!(matches!(&error, SocketsError::Strange(_, given) if given.len() == 2), "{error}");
    let wanted = checked(|config| {
        config.listeners = vec![Listener::new(kept.clone()), anywhere()];
    });
    let sockets = Sockets::take_over(&wanted, given()).unwrap();
    let now = sockets.addresses(&wanted);
    assert!(now[0] == kept && now[1] != gone, "{now:?}");
    drop(offer);
    // A service manager is to have them all.
    let error = Sockets::adopt(&wanted, vec![]).unwrap_err();
    assert!(error.to_string().contains("ListenStream"), "{error}");
}
