//! The leader's disk is full: the node says so and stops, the others go on, nothing that was acknowledged is gone, and the
//! node comes back once there is room.
//!
//! The disk is a small tmpfs; where it may not be mounted, the kernel refuses to let the node's file grow instead
//! (`ulimit -f`), which is another errno on the same path.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use mandoline_core::spec::{Band, JobSpec, Ratio};
use mandoline_proto::pb;

use crate::callers::{PATIENCE, my_turn, program};
use crate::processes::{Cluster, Process};

/// A small disk, mounted at a folder. Dropping it takes it away, whoever still uses it.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=16m", "mandoline-test"]).arg(at);
        let done = mount.output().is_ok_and(|output| output.status.success());
        done.then(|| Self(at.to_owned()))
    }

    /// Fills it to the last byte.
    fn fill(&self) {
        use std::io::Write as _;
        let mut file = std::fs::File::create(self.0.join("filler")).unwrap();
        while file.write_all(&[0; 4_096]).is_ok() {}
    }

    fn make_room(&self) {
        std::fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(&self.0).status());
    }
}

fn job(number: u32) -> pb::JobSpec {
    let spec = JobSpec {
        band: Band::Adaptive(Ratio::from_millionths(100_000 + number)),
        ..JobSpec::new(format!("j-{number}").parse().unwrap())
    };
    pb::JobSpec::from(&spec)
}

/// Every job that was acknowledged is on every node.
async fn check(cluster: &Cluster, jobs: u32) {
    for index in cluster.running() {
        let status = cluster.status(index).await.unwrap();
        for number in 0..jobs {
            let there = status.jobs.iter().any(|status| status.spec == Some(job(number)));
            assert!(there, "node {} does not have job j-{number} of {jobs}", index + 1);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_stops_the_node_by_name_and_loses_nothing() {
    let _turn = my_turn().await;
    let mut cluster = Cluster::describe(program(), 3).unwrap();
    let data: Vec<PathBuf> = cluster.nodes.iter().map(|node| node.data.clone()).collect();
    let disks: Vec<SmallDisk> = data.iter().filter_map(|at| SmallDisk::mount(at)).collect();
    if disks.len() < 3 {
        println!("a tmpfs may not be mounted here: the node's file may not grow instead");
        drop(disks);
        return file_may_not_grow().await;
    }
    for index in 0..3 {
        cluster.start_node(index).unwrap();
    }
    let leader = cluster.settled(PATIENCE).await.unwrap();
    let mut jobs = 0;
    while jobs < 20 {
        cluster.apply(&job(jobs), PATIENCE).await.unwrap();
        jobs += 1;
    }

    disks[leader.index].fill();
    // The file has room of its own for a while; the leader goes when it needs more.
    let mut gone = cluster.nodes[leader.index].process.take().unwrap();
    while gone.ended().is_none() {
        assert!(jobs < 900, "900 changes fit onto a full disk");
        cluster.apply(&job(jobs), PATIENCE).await.unwrap();
        jobs += 1;
    }
    assert_named(&mut gone, &data[leader.index]);
    drop(gone);
    // It may have been the last that was asked, so the others are asked once more.
    cluster.apply(&job(jobs), PATIENCE).await.unwrap();
    jobs += 1;
    check(&cluster, jobs).await;

    // As long as there is no room it does not come back, and says why again or waits for more to write.
    disks[leader.index].make_room();
    cluster.start_node(leader.index).unwrap();
    cluster.settled(PATIENCE).await.unwrap();
    cluster.apply(&job(jobs), PATIENCE).await.unwrap();
    jobs += 1;
    cluster.settled(PATIENCE).await.unwrap();
    check(&cluster, jobs).await;
    println!(
        "the leader's disk was full: it stopped by name, {jobs} changes are there, and it is back"
    );
    drop(cluster);
    drop(disks);
}

/// One node, whose file may not grow past a limit.
async fn file_may_not_grow() {
    let mut cluster = Cluster::start(program(), 1).await.unwrap();
    cluster.apply(&job(0), PATIENCE).await.unwrap();
    let mut jobs = 1;
    let bytes: u64 = std::fs::read_dir(&cluster.nodes[0].data)
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .max()
        .unwrap();
    cluster.kill_node(0);
    // In blocks of 512 bytes; ignored signals stay ignored in what the shell becomes.
    let mut limited = Command::new("sh");
    let script = format!("trap '' XFSZ; ulimit -f {}; exec \"$0\" \"$@\"", bytes / 512);
    limited.args(["-c", &script]).arg(program()).args(cluster.node_args(0));
    let process = Process::spawn(limited, "limited", cluster.dir()).unwrap();
    cluster.nodes[0].process = Some(process);
    cluster.settled(PATIENCE).await.unwrap();
    while cluster.apply(&job(jobs), Duration::from_secs(5)).await.is_ok() {
        jobs += 1;
        assert!(jobs < 900, "900 changes fit into a file that may not grow");
    }
    let mut gone = cluster.nodes[0].process.take().unwrap();
    gone.wait_ended(PATIENCE).await.unwrap();
    assert_named(&mut gone, &cluster.nodes[0].data);
    cluster.start_node(0).unwrap();
    cluster.settled(PATIENCE).await.unwrap();
    check(&cluster, jobs).await;
    cluster.apply(&job(jobs), PATIENCE).await.unwrap();
    println!("the node's file could not grow: it stopped by name, {jobs} changes are there");
}

/// The node ended with an error that names the disk and says what to do.
fn assert_named(gone: &mut Process, data: &Path) {
    let (status, log) = (gone.ended().unwrap(), gone.log_tail());
    assert_eq!(status.code(), Some(2), "{log}");
    let name = data.display().to_string();
    assert!(
        log.contains("disk") && log.contains(&name),
        "it does not name its disk {name}:\n{log}"
    );
    assert!(
        log.contains("try:") || log.contains("make room"),
        "it does not say what to do:\n{log}"
    );
}
