// Runs csi-sanity against a driver whose volumes can only be read.
//
// The suite asks for SINGLE_NODE_WRITER everywhere and has no flag for it. Here a
// client interceptor turns each access mode into MULTI_NODE_READER_ONLY before the
// request leaves, and sets `readonly` where a volume is published. Nothing else changes.
package main

import (
	"context"
	"flag"
	"os"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"google.golang.org/grpc"
)

// verdict is what the suite reports to, in the place of go test.
type verdict struct{ hasFailed bool }

func (v *verdict) Fail() { v.hasFailed = true }

var reader = &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY}

// onlyRead rewrites what a request says of access.
func onlyRead(request any) {
	capabilities := []*csi.VolumeCapability{}
	switch request := request.(type) {
	case *csi.CreateVolumeRequest:
		capabilities = request.VolumeCapabilities
	case *csi.ValidateVolumeCapabilitiesRequest:
		capabilities = request.VolumeCapabilities
	case *csi.NodePublishVolumeRequest:
		capabilities = append(capabilities, request.VolumeCapability)
		request.Readonly = true
	}
	for _, capability := range capabilities {
		if capability != nil {
			capability.AccessMode = reader
		}
	}
}

func rewrite(ctx context.Context, method string, request, reply any, conn *grpc.ClientConn, next grpc.UnaryInvoker, options ...grpc.CallOption) error {
	onlyRead(request)
	return next(ctx, method, request, reply, conn, options...)
}

func main() {
	config := sanity.NewTestConfig()
	flag.StringVar(&config.Address, "endpoint", "", "socket of the driver")
	flag.StringVar(&config.TargetPath, "targets", config.TargetPath, "folder for published volumes; made by the suite")
	flag.StringVar(&config.StagingPath, "staging", config.StagingPath, "folder for staged volumes; made by the suite")
	flag.StringVar(&config.TestVolumeParametersFile, "parameters", "", "YAML file with the parameters of a StorageClass")
	flag.Parse()
	interceptor := grpc.WithUnaryInterceptor(rewrite)
	config.DialOptions = append(config.DialOptions, interceptor)
	config.ControllerDialOptions = append(config.ControllerDialOptions, interceptor)
	verdict := &verdict{}
	sanity.Test(verdict, config)
	if verdict.hasFailed {
		os.Exit(1)
	}
}
